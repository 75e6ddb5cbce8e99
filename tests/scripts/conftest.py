from spoken_model import spoken, spoken_data  # noqa: F401
