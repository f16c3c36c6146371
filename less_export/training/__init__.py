"""Training of phi and psi: text in, a kernel file out (LESS, arXiv 2402.09398, section 3.3)."""
