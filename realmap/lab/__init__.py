"""The experiments that ship: what `realmap demo`, `stress`, `bench` and `campaign` run."""

#: Where the environment has it, a command tells on stderr how it goes, line by line: for a campaign, which reads them.
PROGRESS = "REALMAP_PROGRESS"
