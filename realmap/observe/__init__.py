"""What is going on: a snapshot of a kernel's books, an audit of them against Linux, and a trace of what happens.

The kernel knows nothing of it. Nothing is imported here: who looks at one thing needs little of the others.
"""
