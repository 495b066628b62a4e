#define SEAMOUNT_TARGET avx2
#include "attention.inc"
