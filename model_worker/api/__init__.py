"""What clients see of a model worker: OpenAI's HTTP and our gRPC. Knows nothing of Ray."""
