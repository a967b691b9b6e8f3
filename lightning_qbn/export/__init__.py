"""Files for integer runtimes, and the proof that they compute what was trained."""
