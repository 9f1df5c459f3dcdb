"""How a call travels: what is said (messages), and how it is carried (channel: the socket; ring: shared memory).

And what a kernel tells of itself: asked (records), and without being asked (status).
"""
