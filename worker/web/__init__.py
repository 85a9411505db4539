"""The operator's page in a browser: what the verbs of ``jobworker`` show and do, with nothing of its own
beneath it. Needs the extra ``web``; nothing outside this room imports it but the verb that starts it."""
