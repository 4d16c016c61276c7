"""How a process of ours lives: until when, what it logs, whom it tells that it is well, how it keeps memory."""
