"""Operator's web page. It shows and does what the ``jobworker`` verbs do, by the same functions of ``admin``.

Needs the extra ``web``. Only the command that starts it imports this package.
"""
