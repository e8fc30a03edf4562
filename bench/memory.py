"""Memory of the learner on one device of several, by fake tensors: which model trains on which machines.

The real policy, sharding and optimizer run on tensors that have shapes and no values, in a process group that sends
nothing; storages are counted as they come and go. Attention keeps what a flash kernel keeps. Of two steps the second is
counted, when moments and gradients are there. To that come 5 % for the allocator, and what the tripwire holds.

The last line is JSON with `rows` = list of {`model`, `ranks`, `tokens`, `mode`, `peak_gb`, `fits_gb`, `machine`}, and
`load` = {`share_gb`, `host_gb`, `ratio`}: what a rank of two takes of host memory to load a real file.
"""
