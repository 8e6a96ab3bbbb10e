/* Takes back what vector.h defined. */

#undef PASTE_
#undef PASTE
#undef NAME
#undef TARGET
#undef MULTIPLY_ADD
#undef SET
