#define SEAMOUNT_TARGET avx2
#include "target.inc"
