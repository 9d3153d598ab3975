"""Benchmarks of modular attention against what PyTorch offers: ``python -m benchmarks --help``.

workloads.py  the shapes, their inputs and their useful work
peers.py      attention: ours and every peer behind one interface
aligner.py    aligner, Gram and layer: the same
gate.py       correctness against the float64 reference, before anything is timed
timing.py     interleaved timing, machine description
peak.py       the machine's rate of multiply-adds
memory.py     peak memory beyond inputs and outputs
goals.py      the project's goals, compared with the figures of a run
scaling.py    a program of its own: two threads against one, alone and beside a busy process
cuda.py       a program of its own, on a GPU: python -m benchmarks.cuda
"""
