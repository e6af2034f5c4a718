// The kernels for avx2 machines; the build sets the matching machine flags for this file alone.
#define KV_TABLE avx2_kernels
#define KV_NAME "avx2"
#include "table.h"
