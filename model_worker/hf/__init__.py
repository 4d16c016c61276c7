"""What knows Hugging Face's insides: reading checkpoints, telling models apart, giving a decoder its memory."""
