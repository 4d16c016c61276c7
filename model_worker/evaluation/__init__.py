"""Jobs that say how well a model remembers: protocol, table, JSON, plot."""
