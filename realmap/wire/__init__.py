"""How a call travels: what is said (messages), and how it is carried (channel: the socket; ring: shared memory)."""
