"""Inside one tensor: quantization schemes, their arithmetic and their kernels. Imports torch only."""
