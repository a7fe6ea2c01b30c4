from stages.config.sections import register

register()  # DVC composes conf/ against the dataclasses of the sections
