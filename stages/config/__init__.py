"""Configuration: how params.yaml and the command line become the typed sections that a stage is handed.

entry         the decorator that makes a function a stage
params        params.yaml as plain data, and the groups that are chosen by hand
sections      which sections there are, and where the shape of each lies
compose       conf/ composed as DVC does it, for use as a library
checks        what is checked across sections
environment   the versions of libraries that results depend on
"""
