"""How tokens find experts."""
