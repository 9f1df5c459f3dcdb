"""`realmap campaign`: the runs of `realmap stress` or `realmap bench` on many machines, as one.

plan      what is run on which host, how often, by which seed
work      one run, on its host: the command itself, in a process of its own
here      hosts that are processes of this machine
cluster   hosts of a Dask cluster
run       all runs at once; who is lost is noted, and the others go on
report    what came of it, and what all of them give together; JUnit's XML
page      the same as one HTML file with pictures
compare   two reports: what became slower or faster, beyond noise
"""
