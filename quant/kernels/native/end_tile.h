/* Takes back the macros of an instruction set; see tile.h. */
#undef TARGET
#undef LANES
#undef V
#undef ZERO
#undef ADD_TO
#undef KEEP
