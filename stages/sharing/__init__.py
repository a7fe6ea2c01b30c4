"""Sharing: experiments go to a git remote, their files and run records to a DVC remote, and come from there.

references   the experiments that git knows, here and on a git remote
remote       the DVC remote, and what is wrong with it
files        the files of experiments, by hash
sending      this clone's experiments to both
receiving    experiments from both: their numbers, and a release if asked
objects      the files in DVC's cache, rehashed
"""
