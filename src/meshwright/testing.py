"""What a user's own tests need: functions run on real ranks of this machine, and a pytest fixture for it.

>>> from meshwright.testing import run_ranks
"""
