POLICIES: dict[str, object] = {"gorgo": None}
