"""The C kernels; everything else is in pyproject.toml.

They are optional: without a C compiler the package installs all the same, and other paths do the
work. No header of torch is needed. OpenMP is compiled in but not linked: its functions come from
the library that torch brings, so that both share one pool of threads.
"""

import sys

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "quant.kernels.native._native",
            ["quant/kernels/native/int8.c", "quant/kernels/native/bfloat16.c"],
            depends=["quant/kernels/native/tile.h", "quant/kernels/native/types.h"],
            extra_compile_args=[
                "-O3",
                "-ffp-contract=off",  # the same bits on every processor
                "-Wno-psabi",  # vectors are passed within one file only
                *(["-fopenmp"] if sys.platform == "linux" else []),
            ],
            optional=True,
        )
    ]
)
