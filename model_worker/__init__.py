"""The model worker: gives Hugging Face decoders a memory. It arrives with the next release; see ARCHITECTURE.md."""
