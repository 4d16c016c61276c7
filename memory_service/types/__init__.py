"""The nouns that travel between client, server and store."""
