from spoken_model import generated, spoken, spoken_data  # noqa: F401
