"""DeepSpeed configuration files, found by `sret_scale.config.ds_config`: how the engine computes, never what.

The buckets are 20 million elements (80 MB) instead of DeepSpeed's 500 million: a model here has 5 to 20 million
parameters, and stage 2 allocates whole buckets.
"""
