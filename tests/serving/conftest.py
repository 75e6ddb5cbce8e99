from served import generated, packed, server, spoken, spoken_data  # noqa: F401
