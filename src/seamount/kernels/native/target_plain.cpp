#define SEAMOUNT_TARGET plain
#include "target.inc"
