"""The C kernels and the small all-reduce; everything else is in pyproject.toml.

They are optional: without a C compiler the package installs all the same, and other paths do the
work. No header of torch is needed. OpenMP is compiled in but not linked: its functions come from
the library that torch brings, so that both share one pool of threads.
"""

import sys
from glob import glob

from setuptools import Extension, setup

NATIVE = "quant/kernels/native"
SOURCES = ("int8", "int4", "bfloat16", "attention", "elementwise", "rounding", "program")

setup(
    ext_modules=[
        Extension(
            "quant.kernels.native._native",
            [f"{NATIVE}/{name}.c" for name in SOURCES],
            depends=sorted(glob(f"{NATIVE}/*.h")),
            extra_compile_args=[
                "-O3",
                "-ffp-contract=off",  # the same bits on every processor
                "-Wno-psabi",  # vectors are passed within one file only
                *(["-fopenmp"] if sys.platform == "linux" else []),
            ],
            optional=True,
        ),
        Extension(
            "parallel.collectives._all_reduce",
            ["parallel/collectives/all_reduce.c"],
            extra_compile_args=["-O3"],
            optional=True,
        ),
    ]
)
