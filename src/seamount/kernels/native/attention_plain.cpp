#define SEAMOUNT_TARGET plain
#include "attention.inc"
