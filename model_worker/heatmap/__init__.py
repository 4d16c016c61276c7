"""Heat maps: for a prompt, how much attention each document, passage, layer and token of the prompt had to do with."""
