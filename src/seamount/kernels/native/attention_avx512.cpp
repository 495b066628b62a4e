#define SEAMOUNT_TARGET avx512
#include "attention.inc"
