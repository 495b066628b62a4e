#define SEAMOUNT_TARGET avx512
#include "target.inc"
