"""One memory over many services: a place whose verbs are routed to shards, answered by replicas, and joined exactly."""
