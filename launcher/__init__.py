"""Once per run: the configuration, the tasks, and the workers that carry them out."""

import time

# A start is timed from here, and from before where the system says when the process began.
IMPORTED_AT = time.time()
