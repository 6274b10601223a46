"""The processes that train a model together: DistributedDataParallel and FSDP2."""
