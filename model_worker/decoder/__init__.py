"""A Hugging Face decoder with a memory: forward, generate, attach and detach; what a text leaves to memory."""
