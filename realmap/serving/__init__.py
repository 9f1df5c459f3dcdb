"""How a handler is run, in whichever process: the kernel's, or a user's that serves others. Imports only ever go down.

loop          waits, and calls what it was handed: it knows nobody
lines         everybody who is listened to, by socket and ring
line          one peer's socket and ring: what it said so far, what it has not read yet
standby       the threads of the loop: who takes it from a handler that does not come back
workers       threads for handlers that take long, and each process's share of them
syscalls      Call, and how a handler is run
faults        whether a call touched bytes that were gone
user_buffer   UserBuffer: a handler's buffer argument
caller        what a handler sees of who called, and of the kernel that it runs in
registry      the @syscall decorator, and the handlers by name
signature     what a handler takes
nesting       which services wait for the handler that is at work here
logs          what a kernel has to say besides

What may enter: nothing that knows the books. The caller and the land that mirrors go into are handed in.
"""
