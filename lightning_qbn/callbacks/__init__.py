"""Lightning callbacks: each decides when, and calls one function of the core."""
