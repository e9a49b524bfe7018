// Sets the light or dark theme before anything is drawn: the viewer's choice, or else the system's.
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;
  const applyTheme = () => {
    root.dataset.theme = localStorage.getItem("treeswarm-theme") ?? (dark.matches ? "dark" : "light");
  };
  dark.addEventListener("change", applyTheme);
  document.addEventListener("DOMContentLoaded", () => {
    document.getElementById("theme").addEventListener("click", () => {
      localStorage.setItem("treeswarm-theme", root.dataset.theme === "dark" ? "light" : "dark");
      applyTheme();
    });
  });
  applyTheme();
})();
