"""The native engine on many machines: samples are cut into shards, workers search them, the driver alone writes."""
