// Runs before anything is drawn: the theme that was chosen last, if one was.
try {
  const chosen = localStorage.getItem("theme");
  if (chosen) document.documentElement.dataset.theme = chosen;
} catch (_) { /* storage may be forbidden; then the system's theme it is */ }
