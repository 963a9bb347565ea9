"""What runs on each node of a job: the agent that starts DeepSpeed's launcher there, and the first code of a rank.

    launcher --(stdin of ssh, srun or a child process)--> agent --> deepspeed.launcher.launch --> rank, rank, ...

Every arrow is a pipe or a parent: when the left end dies, by whatever signal, the right end ends too.
"""
