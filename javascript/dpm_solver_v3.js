// The tab "EMS" watches a computation by asking again each time that an answer has changed a hidden text. One answer that is
// lost on its way (a sleeping laptop, a broken connection) would end that. So if the text has stood still for long while a
// computation is shown, press Refresh, which begins the asking anew.
(() => {
  const patience = 15000;
  const find = (what) => (typeof gradioApp === "function" ? gradioApp() : document).querySelector(what);
  let seen = "";
  let since = Date.now();
  setInterval(() => {
    const beat = find("#dpm_solver_v3_beat textarea, #dpm_solver_v3_beat input");
    const refresh = find("#dpm_solver_v3_refresh");
    if (!beat || !refresh || !find("#dpm_solver_v3_status progress") || beat.value !== seen) {
      seen = beat ? beat.value : "";
      since = Date.now();
    } else if (Date.now() - since > patience) {
      since = Date.now();
      refresh.click();
    }
  }, 1000);
})();
