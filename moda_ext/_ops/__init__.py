"""What stands between the public functions and the operators of csrc/.

library.py loads them, operators.py declares what PyTorch must know of each, backend.py says who computes.
"""
