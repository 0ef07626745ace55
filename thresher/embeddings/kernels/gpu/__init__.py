"""The backend for CUDA: Triton kernels on the storage that all backends share."""
