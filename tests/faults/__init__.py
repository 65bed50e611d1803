"""The batteries: each breaks something many times over, and looks at what is left.

A battery is one module, ``test_<fault>.py``; alone it is started by
``python run.py tests tests/faults/test_<fault>.py``, with ``--full`` in full, with
``--size NAME=N`` in a size of one's own, and with ``--seed N`` as that run was. What they share:
:mod:`.sagas` are driven, in :mod:`.children`; :mod:`.ledger` notes their effects outside of it all,
and :mod:`.judge` holds the invariants against both.
"""
