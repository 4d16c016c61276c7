"""Generated from protos/model_worker/v1; never edited."""
