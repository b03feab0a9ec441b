// What the CUDA half of the module was compiled for, and how many cards it can see.
#pragma once

// Number of CUDA devices the driver offers; 0 where there is no driver, or one too old.
int wise_cuda_device_count();

// The architectures compiled in, as asked for at build time, such as "80;90a+PTX".
const char* wise_cuda_archs();

// Version of the CUDA toolkit that compiled the kernels, such as "13.0.88".
const char* wise_cuda_toolkit();
